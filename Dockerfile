# atmossl with CUDA, for training and prediction:
#
#   docker build -t atmossl .
#   mkdir -p runs
#   run="docker run --rm --gpus all --shm-size 8g --user $(id -u):$(id -g) -v $PWD/runs:/home/atmossl/runs"
#   $run atmossl train experiment=quickstart paths.output=runs/first
#   $run atmossl predict task=forecast checkpoint=runs/first/checkpoints/last.ckpt \
#       init_time=1959-02-12T00 output=runs/forecast.zarr
#   $run atmossl evaluate checkpoint=runs/first/checkpoints/last.ckpt every=8 output=runs/report
#
# Each command reads what the one before wrote: all of it lies in the mounted folder runs/, as do
# statistics of training data (runs/.cache), which take hours to compute on large stores. Leave out
# --gpus all where there is no GPU. Loader workers hand batches over in shared memory, hence
# --shm-size. Without --user the image's own user, 10001, must be able to write runs/.
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
extras = ("train", "report", "cloud", "gpu", "grib"); \
print(*p["dependencies"], *(r for e in extras for r in p["optional-dependencies"][e]), sep="\n")' \
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
    && mkdir -p /home/atmossl/runs && chown atmossl /home/atmossl/runs \
    && chmod 755 /home/atmossl  # for any --user
COPY --from=build /opt/atmossl /opt/atmossl
# HOME and caches in /tmp, so that any --user can write them. Weights & Biases needs a key to go online.
ENV PATH=/opt/atmossl/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib \
    ATMOSSL_CACHE=/home/atmossl/runs/.cache
WORKDIR /home/atmossl
USER atmossl
ENTRYPOINT ["atmossl"]
CMD ["--help"]
