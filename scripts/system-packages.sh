#!/usr/bin/env bash
# Sees to the programs that do not come from PyPI: Java 17 or later for Spark, Prometheus for the canary, Redis for a test.
set -euo pipefail

missing=()
java_version=$(java -version 2>&1 | sed -nE 's/.*version "([0-9]+).*/\1/p' | head -n 1 || true)
[[ ${java_version:-0} -ge 17 ]] || missing+=(openjdk-17-jre-headless)
command -v prometheus > /dev/null || missing+=(prometheus)
command -v redis-server > /dev/null || missing+=(redis-server)
[[ ${#missing[@]} -eq 0 ]] && exit 0

if ! command -v apt-get > /dev/null; then
  echo "Please install Java 17 or later, Prometheus and Redis, then run make again (missing here: ${missing[*]})." >&2
  exit 1
elif [[ $EUID -eq 0 ]]; then
  as_root=()
elif sudo -n true 2> /dev/null; then
  as_root=(sudo -n)
else
  echo "Please run 'sudo apt-get install --no-install-recommends ${missing[*]}', then make again." >&2
  exit 1
fi
echo "installing ${missing[*]}"
# The servers that run here are started by who uses them: Debian's services need not run.
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
  apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null
