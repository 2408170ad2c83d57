# Functions of the scripts in this folder: read the config, call gcloud, report errors.
# shellcheck shell=bash

set -euo pipefail

readonly KEYS="PROJECT ZONE TYPE NAME RUNTIME TIER INSTALL BUCKET POLL_SECONDS CLUSTER IMAGE STORAGE RESTARTS"
# shellcheck disable=SC2016 # expanded on the workers
readonly WORK_DIR='$HOME/selftrain'

CONFIG=pod.env
DRY_RUN=false
YES=false
REST=()

die() { # print one sentence and exit with code 2
  echo "$(basename "$0"): $*" >&2
  exit 2
}

usage() { # print the comment at the top of the script
  sed -n '2,/^$/ s/^# \{0,1\}//p' "$0"
  exit 0
}

parse() { # parse the flags of all scripts; store the other arguments in REST
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

read_config() { # read KEY=value lines; nothing in them is executed
  [[ -f $CONFIG ]] || die "$CONFIG: no such file; copy $(dirname "$0")/pod.env.example and edit it"
  local line key number=0
  for key in $KEYS; do # the file alone configures the scripts, not the environment of the shell
    unset "$key"
  done
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
    [[ $line =~ ^([A-Z_]+)=(.*)$ ]] || die "$CONFIG:$number: expected a line of the form KEY=value"
    key=${BASH_REMATCH[1]}
    [[ " $KEYS " == *" $key "* ]] || die "$CONFIG:$number: unknown key $key; the keys are $KEYS"
    printf -v "$key" '%s' "${BASH_REMATCH[2]}"
  done <"$CONFIG"
  for key in PROJECT ZONE TYPE NAME; do
    [[ -n ${!key:-} ]] || die "$CONFIG: $key is missing"
  done
  RUNTIME=${RUNTIME:-$(runtime_version "$TYPE")}
  TIER=${TIER:-spot}
  POLL_SECONDS=${POLL_SECONDS:-30}
  BUCKET=${BUCKET:-}
  # shellcheck disable=SC2016 # expanded on the workers
  INSTALL=${INSTALL:-'python3 -m venv $HOME/selftrain/venv && wheel=$(ls $HOME/selftrain/out/jax_selftrain-*.whl | tail -n 1) && $HOME/selftrain/venv/bin/pip install -q "$wheel[tpu,harness]"'}
  [[ $NAME =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || die "$CONFIG: NAME is $NAME; it must have only lowercase letters, digits and dashes"
  [[ $TIER =~ ^(spot|reserved|on-demand)$ ]] || die "$CONFIG: TIER is $TIER; it must be spot, reserved or on-demand"
  [[ -z $BUCKET || $BUCKET =~ ^gs://[a-z0-9][-_.a-z0-9]*(/[-_.A-Za-z0-9/]*)?$ ]] ||
    die "$CONFIG: BUCKET is $BUCKET; it must be gs://BUCKET or gs://BUCKET/FOLDER of letters, digits, dots and dashes"
  [[ $POLL_SECONDS =~ ^[0-9.]+$ ]] || die "$CONFIG: POLL_SECONDS is $POLL_SECONDS; it must be a number"
  # shellcheck disable=SC2034 # read by run and resume
  JOB=$(dirname "$CONFIG")/.$NAME.job
}

runtime_version() { # TYPE: print Google's runtime version for this TPU generation
  case $1 in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) die "$CONFIG: unknown TYPE $1 (v4-…, v5litepod-…, v5p-…, v6e-…); set RUNTIME to its runtime version" ;;
  esac
}

confirm() { # LOCATION: ask before a deletion
  if ! $YES && ! $DRY_RUN; then
    local typed
    read -r -p "Delete $NAME $1? Type its name: " typed
    [[ $typed == "$NAME" ]] || die "nothing was deleted"
  fi
}

call() { # run gcloud, or print the command in a dry run
  if $DRY_RUN; then
    printf 'gcloud'
    printf ' %q' "$@"
    printf '\n'
  else
    gcloud "$@"
  fi
}

queued() { # VERB FLAGS: run a verb of `gcloud compute tpus queued-resources`
  local verb=$1
  shift
  call compute tpus queued-resources "$verb" "$NAME" --project="$PROJECT" --zone="$ZONE" "$@"
}

on_workers() { # WORKER COMMAND: run the command over ssh
  call compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker="$1" --command="$2"
}

state() { # print the state of the queued resource: ABSENT if it does not exist, UNKNOWN if gcloud fails
  local output
  if output=$(gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
    --format='value(state.state)' 2>&1); then
    tail -n 1 <<<"$output"
  elif [[ $output == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    echo "$output" >&2
    echo UNKNOWN
  fi
}

request() { # request the slice
  local -a tier=()
  case $TIER in
    spot) tier=(--spot) ;;
    reserved) tier=(--reserved) ;;
  esac
  queued create --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "${tier[@]}"
}

wait_until_granted() { # request the slice again after a failure or a preemption
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
      UNKNOWN) ((++failed < 10)) || die "gcloud failed ten times; see the errors above" ;;
    esac
    [[ $now == ABSENT ]] || sleep "$POLL_SECONDS"
  done
}

install() { # install on all workers and mount the bucket, which keeps the results after a preemption
  local mount=true bucket=${BUCKET#gs://}
  local folder=${bucket#"${bucket%%/*}"}
  folder=${folder#/}
  if [[ -n $BUCKET ]]; then
    mount="(mountpoint -q $WORK_DIR/out || gcsfuse --implicit-dirs ${folder:+--only-dir $folder} ${bucket%%/*} $WORK_DIR/out)"
  fi
  on_workers all "mkdir -p $WORK_DIR/out && $mount && $INSTALL"
}

start() { # COMMAND (shell-quoted): start it detached on all workers; it writes its exit code to a file
  local script
  script="PATH=\$HOME/selftrain/venv/bin:\$PATH
$1 >>log 2>&1
echo \$? >exit.new && mv exit.new exit"
  on_workers all "cd $WORK_DIR && rm -f exit && printf '%s\n' $(printf '%q' "$script") >job.sh && { setsid nohup bash job.sh </dev/null >/dev/null 2>&1 & echo \$! >pid; }"
}

exit_codes() { # print one line for each worker: the exit code, `running` or `gone`
  local output
  output=$(on_workers all "cd $WORK_DIR 2>/dev/null && if [ -f exit ]; then cat exit; elif kill -0 \$(cat pid) 2>/dev/null; then echo running; else echo gone; fi || echo gone") || return
  $DRY_RUN && echo "$output" && return
  grep -E '^(running|gone|[0-9]+)$' <<<"$output"
}
