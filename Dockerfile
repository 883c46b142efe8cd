# A container for a machine with or without a GPU: how to build and run it stands in README.md.
# The CUDA libraries come with the pinned torch wheels, so a plain Python image is CUDA-capable as soon as the NVIDIA
# container toolkit hands in the driver (`--gpus all`); a CUDA base image would carry the same gigabytes a second time.
FROM python:3.12.12-slim-bookworm

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# a compiler because torch.compile writes C++ and Triton kernels; curl for Quarto; tini so that Ctrl-C reaches the kernels
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates curl g++ git make tini \
 && rm -rf /var/lib/apt/lists/*

ARG QUARTO_VERSION=1.9.38
ARG QUARTO_SHA256_AMD64=ea8c897368791ad9f200010c087ea3111b2e556b12a960487dd4e216902aa102
ARG QUARTO_SHA256_ARM64=75fbc5c1121ffe65e564e9d24711db2ad8f617f9552f5dc7d8a06307d72dde38
RUN architecture=$(dpkg --print-architecture) \
 && case "$architecture" in \
      amd64) sha256=$QUARTO_SHA256_AMD64 ;; \
      arm64) sha256=$QUARTO_SHA256_ARM64 ;; \
      *) echo "there is no Quarto release for $architecture" >&2; exit 1 ;; \
    esac \
 && archive=/tmp/quarto.tar.gz \
 && curl --fail --silent --show-error --location --proto '=https' --retry 5 --output "$archive" \
      "https://github.com/quarto-dev/quarto-cli/releases/download/v${QUARTO_VERSION}/quarto-${QUARTO_VERSION}-linux-${architecture}.tar.gz" \
 && echo "$sha256  $archive" | sha256sum --check - \
 && mkdir -p /opt/quarto \
 && tar --extract --gzip --file "$archive" --directory /opt/quarto --strip-components 1 \
 && rm "$archive" \
 && ln -s /opt/quarto/bin/quarto /usr/local/bin/quarto

# the one volume: /flatmin/data is FLATMIN_DATA, the others are where runs/, sweeps/ and searches/ of the project lead
RUN useradd --create-home --uid 1000 --shell /bin/bash flatmin \
 && install --directory --owner flatmin --group flatmin /flatmin /flatmin/data /flatmin/runs /flatmin/sweeps /flatmin/searches \
      /home/flatmin/flatmin_nb
USER 1000
WORKDIR /home/flatmin/flatmin_nb

# one thread, as in make run: the small nets are faster so; -e OMP_NUM_THREADS=8 for the larger ones on a CPU
ENV PATH=/home/flatmin/flatmin_nb/.venv/bin:$PATH \
    FLATMIN_DATA=/flatmin/data \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    OMP_NUM_THREADS=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DO_NOT_TRACK=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    WANDB_MODE=disabled \
    WANDB_ERROR_REPORTING=false

# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu leaves CUDA out; empty, it is as if it were not there
ARG PIP_EXTRA_INDEX_URL=
# the pinned install, in a layer that changes only when what is installed does: the README, which setup.py reads, stays out of it
COPY --chown=flatmin:flatmin Makefile settings.ini setup.py constraints.txt ./
COPY --chown=flatmin:flatmin house/install.py house/install.py
COPY --chown=flatmin:flatmin flatmin_nb/__init__.py flatmin_nb/__init__.py
RUN touch README.md \
 && make install \
 && jupyter labextension disable "@jupyterlab/apputils-extension:announcements"

COPY --chown=flatmin:flatmin . .
RUN ln -s /flatmin/runs /flatmin/sweeps /flatmin/searches .

# .dockerignore leaves .git out, so what the records say of the commit comes from outside; last, as it changes each time
ARG COMMIT=
ENV FLATMIN_COMMIT=$COMMIT

VOLUME ["/flatmin"]
EXPOSE 8888
ENTRYPOINT ["tini", "--", "bash", "/home/flatmin/flatmin_nb/house/enter.sh"]
# Jupyter makes a token and prints the address with it; set JUPYTER_TOKEN to choose one. No port but 8888 leads out, so it tries no other
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--port=8888", "--ServerApp.port_retries=0", "--no-browser", \
     "--ServerApp.root_dir=/home/flatmin/flatmin_nb", "--LabApp.default_url=/lab/tree/nbs/00_tour.ipynb"]
