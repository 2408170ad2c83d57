# Shared by the scripts of this folder: reading the config, calling gcloud, saying what is wrong.
# shellcheck shell=bash

set -euo pipefail

readonly KEYS="PROJECT ZONE TYPE NAME RUNTIME TIER INSTALL BUCKET POLL_SECONDS CLUSTER IMAGE STORAGE RESTARTS"
# shellcheck disable=SC2016 # expanded on the workers
readonly PLACE='$HOME/selftrain'

CONFIG=pod.env
DRY_RUN=false
YES=false
REST=()

die() { # one clear sentence, exit code 2
  echo "$(basename "$0"): $*" >&2
  exit 2
}

usage() { # the comment at the top of the script is its help
  sed -n '2,/^$/ s/^# \{0,1\}//p' "$0"
  exit 0
}

parse() { # the flags that all scripts have; the rest stays in REST
  while (($#)); do
    case $1 in
      --help | -h) usage ;;
      --config)
        (($# > 1)) || die "--config needs a file"
        CONFIG=$2
        shift
        ;;
      --dry-run) DRY_RUN=true ;;
      --yes) YES=true ;;
      --)
        shift
        REST+=("$@")
        break
        ;;
      *) REST+=("$1") ;;
    esac
    shift
  done
  read_config
}

read_config() { # KEY=value lines, nothing of which is executed
  [[ -f $CONFIG ]] || die "$CONFIG: no such file; copy $(dirname "$0")/pod.env.example and fill it in"
  local line key number=0
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
    [[ $line =~ ^([A-Z_]+)=(.*)$ ]] || die "$CONFIG:$number: not a line of the form KEY=value"
    key=${BASH_REMATCH[1]}
    [[ " $KEYS " == *" $key "* ]] || die "$CONFIG:$number: $key is unknown; known: $KEYS"
    printf -v "$key" '%s' "${BASH_REMATCH[2]}"
  done <"$CONFIG"
  for key in PROJECT ZONE TYPE NAME; do
    [[ -n ${!key:-} ]] || die "$CONFIG: $key is missing"
  done
  RUNTIME=${RUNTIME:-$(runtime_of "$TYPE")}
  TIER=${TIER:-spot}
  POLL_SECONDS=${POLL_SECONDS:-30}
  BUCKET=${BUCKET:-}
  # shellcheck disable=SC2016 # expanded on the workers
  INSTALL=${INSTALL:-'python3 -m venv $HOME/selftrain/venv && $HOME/selftrain/venv/bin/pip install -q "jax-selftrain[tpu]"'}
  [[ $NAME =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || die "$CONFIG: NAME $NAME: small letters, digits and dashes only"
  [[ $TIER =~ ^(spot|reserved|on-demand)$ ]] || die "$CONFIG: TIER is $TIER; it must be spot, reserved or on-demand"
  [[ -z $BUCKET || $BUCKET == gs://* ]] || die "$CONFIG: BUCKET $BUCKET: must begin with gs://"
  # shellcheck disable=SC2034 # read by run and resume
  JOB=$(dirname "$CONFIG")/.$NAME.job
}

runtime_of() { # the software that Google names for each generation
  case $1 in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) die "$CONFIG: TYPE $1 is unknown (v4-…, v5litepod-…, v5p-…, v6e-…); name its software with RUNTIME" ;;
  esac
}

confirm() { # WHERE: before something is deleted
  if ! $YES && ! $DRY_RUN; then
    local typed
    read -r -p "Delete $NAME $1? Type its name: " typed
    [[ $typed == "$NAME" ]] || die "nothing was deleted"
  fi
}

call() { # gcloud, or what would be called
  if $DRY_RUN; then
    printf 'gcloud'
    printf ' %q' "$@"
    printf '\n'
  else
    gcloud "$@"
  fi
}

queued() { # a verb of queued resources
  local verb=$1
  shift
  call compute tpus queued-resources "$verb" "$NAME" --project="$PROJECT" --zone="$ZONE" "$@"
}

on_workers() { # WORKER COMMAND: over ssh
  call compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker="$1" --command="$2"
}

state() { # of the queued resource; ABSENT where there is none, UNKNOWN (and what gcloud says) where it cannot be asked
  local said
  if said=$(gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
    --format='value(state.state)' 2>&1); then
    tail -n 1 <<<"$said"
  elif [[ $said == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    echo "$said" >&2
    echo UNKNOWN
  fi
}

request() { # ask for the slice
  local -a tier=()
  case $TIER in
    spot) tier=(--spot) ;;
    reserved) tier=(--reserved) ;;
  esac
  queued create --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "${tier[@]}"
}

wait_until_granted() { # asks again whenever the request has failed or the slice was taken away
  if $DRY_RUN; then
    request
    return
  fi
  local now before='' failed=0
  while true; do
    now=$(state)
    [[ $now == "$before" ]] || echo "$NAME: $now"
    before=$now
    case $now in
      ACTIVE) return ;;
      ABSENT) request ;;
      FAILED | SUSPENDED) queued delete --force --quiet ;;
      UNKNOWN) ((++failed < 10)) || die "gcloud failed ten times; see above" ;;
    esac
    [[ $now == ABSENT ]] || sleep "$POLL_SECONDS"
  done
}

install() { # the same on all workers; a bucket is mounted where the results are to outlive the slice
  local mount=true bucket=${BUCKET#gs://}
  local folder=${bucket#"${bucket%%/*}"}
  folder=${folder#/}
  if [[ -n $BUCKET ]]; then
    mount="(mountpoint -q $PLACE/out || gcsfuse --implicit-dirs ${folder:+--only-dir $folder} ${bucket%%/*} $PLACE/out)"
  fi
  on_workers all "mkdir -p $PLACE/out && $mount && $INSTALL"
}

start() { # a command, quoted as for a shell: detached, on all workers; its exit code is kept
  local script
  script="PATH=\$HOME/selftrain/venv/bin:\$PATH
$1 >>log 2>&1
echo \$? >exit.new && mv exit.new exit"
  on_workers all "cd $PLACE && rm -f exit && printf '%s\n' $(printf '%q' "$script") >job.sh && { setsid nohup bash job.sh </dev/null >/dev/null 2>&1 & echo \$! >pid; }"
}

exit_codes() { # one line for each worker: its exit code, or `running`, or `gone`
  local said
  said=$(on_workers all "cd $PLACE 2>/dev/null && if [ -f exit ]; then cat exit; elif kill -0 \$(cat pid) 2>/dev/null; then echo running; else echo gone; fi || echo gone") || return
  $DRY_RUN && echo "$said" && return
  grep -E '^(running|gone|[0-9]+)$' <<<"$said"
}
