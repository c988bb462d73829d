# Sightline on any CPU:  docker build -t sightline .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" sightline batch holiday.mp4 --out out
# A node of a Ray cluster:  docker run --net=host --shm-size=4g --entrypoint ray sightline start --address HEAD:6379 --block
FROM python:3.11.14-slim-bookworm

# What OpenCV's windows link to, though none is opened here. Video codecs come with PyAV.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/sightline
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE cli.py ./
COPY engines engines
COPY realtime realtime
COPY calib calib
# ray[default] besides: what takes jobs, and the dashboard.
RUN pip install --no-cache-dir --constraint constraints.txt '.[cluster,web]' 'ray[default]'

# Runs as a plain user. The cache may be written by any, so that --user "$(id -u):$(id -g)" gives results that are yours.
RUN useradd --create-home --no-log-init --uid 10001 sightline \
    && mkdir --parents /work /var/cache/sightline \
    && chown sightline: /work \
    && chmod 1777 /var/cache/sightline

# Engines and fetched files are kept here: mount a volume to keep them longer.
ENV SIGHTLINE_CACHE=/var/cache/sightline MPLCONFIGDIR=/tmp/matplotlib RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
VOLUME /var/cache/sightline
USER sightline
WORKDIR /work
ENTRYPOINT ["sightline"]
CMD ["--help"]
