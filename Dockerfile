# Two images: the operator, without torch, and the trainer. Docker, BuildKit and buildah build them
# alike:
#   docker build --target operator -t modelchain-operator .
#   buildah bud --target trainer --build-arg BASE=docker.io/library/python:3.12-bookworm \
#     -t modelchain-trainer .
# BASE: anything with Python 3.11 or newer, its venv module and pip. On GPUs the trainer compiles
# its layers if the base has a C compiler and Python's headers, which the slim one has not.
ARG BASE=docker.io/library/python:3.12-slim-bookworm

FROM ${BASE} AS base
USER 0
# The virtual environment has no pip: the base's installs into it.
RUN python3 -m venv --without-pip /opt/modelchain
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
WORKDIR /src
COPY pyproject.toml constraints.txt ./

# Our code alone, compiled. It lies above the dependencies, so a change of it moves kilobytes.
FROM base AS code
COPY README.md LICENSE ./
COPY core core
COPY data data
COPY trainer trainer
COPY operator operator
COPY benchmarks/modelchain_bench benchmarks/modelchain_bench
RUN python3 -m pip --python /opt/modelchain/bin/python install --no-cache-dir --retries 10 \
    --no-deps .

# With the source's folders empty, pip installs what pyproject.toml asks for and a package without
# modules.
FROM base AS operator-dependencies
RUN mkdir core data trainer operator benchmarks && touch README.md LICENSE && \
    python3 -m pip --python /opt/modelchain/bin/python install --no-cache-dir --retries 10 \
    -c constraints.txt '.[operator]'

FROM base AS trainer-dependencies
RUN mkdir core data trainer operator benchmarks && touch README.md LICENSE && \
    python3 -m pip --python /opt/modelchain/bin/python install --no-cache-dir --retries 10 \
    -c constraints.txt '.[trainer]'

FROM operator-dependencies AS operator
COPY --from=code /opt/modelchain /opt/modelchain
# USER: kopf and torch ask for a name, and an arbitrary UID has none.
ENV PATH=/opt/modelchain/bin:$PATH USER=modelchain
ARG VERSION=0.1.0 REVISION=unknown
LABEL org.opencontainers.image.title="modelchain-operator" \
      org.opencontainers.image.description="Watches chains and launches a job for each attempt" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# Nothing is written to the image and nothing belongs to the user: any other UID does as well.
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["modelchain-operator"]

FROM trainer-dependencies AS trainer
COPY --from=code /opt/modelchain /opt/modelchain
# USER: kopf and torch ask for a name, and an arbitrary UID has none.
ENV PATH=/opt/modelchain/bin:$PATH USER=modelchain
ARG VERSION=0.1.0 REVISION=unknown
LABEL org.opencontainers.image.title="modelchain-trainer" \
      org.opencontainers.image.description="Trains a stage, packs data, verifies artifacts" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["modelchain"]
