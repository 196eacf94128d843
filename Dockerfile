# The command `spice` with a pretrained network inside, for a processor.
#   docker build -t spice-pl .
#   docker run --rm -v "$HOME/photos:/photos:ro" -v "$PWD:/work" spice-pl /photos
FROM python:3.12-slim
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu . \
    && rm -rf /src/*
WORKDIR /work
ENTRYPOINT ["spice"]
