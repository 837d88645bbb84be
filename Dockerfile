# Two images from one wheel:
#   docker build --target api .       api, scheduler, flower, migrate, keys: no torch
#   docker build --target worker .    one per node with GPUs: torch with CUDA, in an environment of its own
# docker-compose.yml builds both. Dependencies have the versions of constraints.txt.

ARG PYTHON=python:3.11-slim-bookworm


FROM ${PYTHON} AS wheel
WORKDIR /build
COPY constraints.txt .
RUN pip install --no-cache-dir --constraint constraints.txt build hatchling
COPY . .
RUN python -m build --wheel --no-isolation --outdir /wheel
# torch is left to the worker's stage: the tests' machines pin the CPU build.
RUN sed '/^torch==/d' constraints.txt > /wheel/constraints.txt


FROM ${PYTHON} AS base
# Whatever one file of the image needs: an unprivileged user, its home, and the store's mount point.
# A named volume that is empty takes the owner of the folder that it is mounted on.
RUN useradd --uid 10001 --no-create-home --home-dir /var/lib/tuneyard tuneyard \
    && install --directory --owner tuneyard --group tuneyard /var/lib/tuneyard /store
ENV PATH=/opt/tuneyard/bin:$PATH \
    PYTHONNOUSERSITE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    TUNEYARD_HOME=/var/lib/tuneyard \
    TUNEYARD_STORE_URL=/store


FROM ${PYTHON} AS api-packages
COPY --from=wheel /wheel /wheel
RUN python -m venv --without-pip /opt/tuneyard \
    && pip --python /opt/tuneyard/bin/python install --no-cache-dir \
        --constraint /wheel/constraints.txt "$(echo /wheel/*.whl)[api,flower,s3,worker]"


FROM ${PYTHON} AS worker-packages
COPY --from=wheel /wheel /wheel
RUN python -m venv --without-pip /opt/tuneyard \
    && pip --python /opt/tuneyard/bin/python install --no-cache-dir \
        --constraint /wheel/constraints.txt "$(echo /wheel/*.whl)[s3,worker]"
# Runners have an interpreter of their own: the worker needs no torch, and they no database.
# The package index has torch with CUDA under this name, which pins each of the CUDA libraries.
ARG TORCH=torch==2.13.0
RUN python -m venv --without-pip /opt/runner \
    && pip --python /opt/runner/bin/python install --no-cache-dir \
        --constraint /wheel/constraints.txt "${TORCH}" "$(echo /wheel/*.whl)[metrics,runner]"


FROM base AS worker
COPY --from=worker-packages /opt/tuneyard /opt/tuneyard
COPY --from=worker-packages /opt/runner /opt/runner
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TUNEYARD_RUNNER_PYTHON=/opt/runner/bin/python
USER 10001:10001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD ["tuneyard", "health", "worker"]
ENTRYPOINT ["tuneyard"]
CMD ["worker", "--json"]


FROM base AS api
COPY --from=api-packages /opt/tuneyard /opt/tuneyard
USER 10001:10001
EXPOSE 8800
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s CMD ["tuneyard", "health", "api"]
ENTRYPOINT ["tuneyard"]
CMD ["api", "--json"]
