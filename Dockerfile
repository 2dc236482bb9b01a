# Serves a bundle on a CPU; docs/guides/serving.md has the commands.
#
# Build argument CPU_INDEX: the address of the package index with torch's build for CPUs, which the
# selector on pytorch.org gives. Without it the image gets the build for CUDA, several times as large.
FROM python:3.11-slim

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /opt/gmpipe

# Before the code, so that a change of the code downloads none of it again.
ARG CPU_INDEX=""
COPY constraints.txt ./
RUN pip install --constraint constraints.txt ${CPU_INDEX:+--index-url "$CPU_INDEX"} torch torchvision

COPY pyproject.toml README.md LICENSE ./
COPY pipeline/ pipeline/
COPY stages/ stages/
RUN pip install --constraint constraints.txt '.[serve]' \
    && useradd --system --no-create-home --uid 10001 gmpipe

USER 10001
WORKDIR /
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# As a list, so that the service gets the SIGTERM of `docker stop`.
ENTRYPOINT ["gmpipe", "serve", "/bundle", "--host", "0.0.0.0"]
