#!/usr/bin/env bash
# Builds the image, runs the demo federation to its end, copies the run out, and removes everything but the image.
#
#   docker/federation.sh [FOLDER]      where the run goes; runs/federation by default
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-runs/federation}
project=tsugiki-$$ # another federation may be running

docker info >/dev/null 2>&1 || { echo "no Docker engine answers: start one, or see \`docker info\`" >&2; exit 1; }
if docker compose version >/dev/null 2>&1; then
    compose() { docker compose --project-name "$project" --file docker/compose.yaml "$@"; }
elif command -v docker-compose >/dev/null; then
    compose() { docker-compose --project-name "$project" --file docker/compose.yaml "$@"; }
else
    echo "no Docker Compose: install the compose plugin, or docker-compose 1.29" >&2
    exit 1
fi
[ ! -e "$target" ] || { echo "$target is there already: move it away, or name another folder" >&2; exit 1; }
mkdir -p "$(dirname "$target")"

trap 'compose down --volumes --timeout 20 >/dev/null 2>&1' EXIT
compose build
compose up --detach || { compose logs --tail 30 >&2; exit 1; }
server=$(compose ps --quiet --all server)
docker logs --follow "$server" &
status=$(docker wait "$server")
wait
if [ "$status" -ne 0 ]; then
    compose logs --tail 30
    exit "$status"
fi
docker cp "$server:/work/runs/demo" "$target"
echo "adapter: $target/adapter"
echo "report: $target/report.html"
