# The image of tpu_scripts/gke (IMAGE in pod.env), or of a machine with GPUs. In a clone:
#
#   docker build -t IMAGE . && docker push IMAGE
#   docker build --build-arg EXTRAS=cuda,harness -t IMAGE .
FROM python:3.12-slim
ARG EXTRAS=tpu,harness,gcs
WORKDIR /opt/jax-selftrain
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY tpu_scripts tpu_scripts
COPY jax_selftrain jax_selftrain
RUN pip install --no-cache-dir ".[$EXTRAS]"
WORKDIR /work
CMD ["jax-selftrain", "--help"]
