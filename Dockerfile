# atmossl with CUDA, for training and prediction:
#
#   docker build -t atmossl .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/runs:/home/atmossl/runs" atmossl \
#       train experiment=quickstart
#   docker run --rm --gpus all -v "$PWD/runs:/home/atmossl/runs" atmossl \
#       predict task=forecast checkpoint=runs/quickstart/checkpoints/last.ckpt data=sample \
#       init_time=1959-02-01T00 output=runs/forecast.zarr
#
# Loader workers hand batches over in shared memory, hence --shm-size. The user in the image has
# id 10001: a mounted folder must be writable for it, or run with --user "$(id -u):$(id -g)".
# torch's wheels bring cuDNN and NCCL, so the small `base` image with the CUDA runtime is enough.
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-base-ubuntu24.04

FROM ${CUDA_IMAGE} AS python
ENV DEBIAN_FRONTEND=noninteractive
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv ca-certificates \
    && rm -rf /var/lib/apt/lists/*

FROM python AS build
RUN python3 -m venv /opt/atmossl && python3 -m venv /opt/hatch
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# Dependencies first: this layer, by far the largest, changes only with these two files.
COPY pyproject.toml constraints.txt ./
RUN python3 -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
x = p["optional-dependencies"]; print(*p["dependencies"], *x["gpu"], *x["cloud"], sep="\n")' \
    > requirements.txt \
    && /opt/atmossl/bin/pip install -c constraints.txt -r requirements.txt
RUN /opt/hatch/bin/pip install hatchling
COPY README.md LICENSE data_catalog.yaml ./
COPY conf conf
COPY atmossl atmossl
RUN /opt/hatch/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && /opt/atmossl/bin/pip install --no-deps /wheels/atmossl-*.whl

FROM python AS run
RUN useradd --uid 10001 --create-home atmossl \
    && mkdir -p /home/atmossl/runs && chown atmossl /home/atmossl/runs
COPY --from=build /opt/atmossl /opt/atmossl
# HOME and caches in /tmp, so that any --user can write them. Weights & Biases needs a key to go online.
ENV PATH=/opt/atmossl/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /home/atmossl
USER atmossl
ENTRYPOINT ["atmossl"]
CMD ["--help"]
