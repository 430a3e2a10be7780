#!/usr/bin/env bash
# `make flows`: run the server and a worker on this machine until Ctrl-C, with all deployments. Needs PREFECT_API_URL.
set -euo pipefail
server='' worker=''
stop() { # the worker first: it ends its runs and reports that to the server
  trap - EXIT
  for pid in $worker $server; do
    kill "$pid" 2>/dev/null || continue
    timeout 40 tail --pid="$pid" -f /dev/null || kill -9 "$pid" 2>/dev/null
  done
}
trap stop EXIT
trap exit INT TERM HUP
port=${PREFECT_API_URL##*:}
port=${port%%/*}
if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
  echo "port $port is taken, perhaps by another \`make flows\`; end that, or choose: make flows PORT=4300" >&2
  exit 2
fi
prefect server start --host 127.0.0.1 --port "$port" --log-level WARNING &
server=$!
until python -c "import urllib.request as u; u.urlopen('$PREFECT_API_URL/health')" 2>/dev/null; do
  kill -0 "$server" 2>/dev/null || { echo "the server did not start; see above" >&2; exit 1; }
  sleep 0.5
done
prefect work-pool create local --type process --overwrite
prefect --no-prompt deploy --all
python -m flows.automations
echo "page: http://127.0.0.1:$port  now: prefect deployment run retrain/retrain-nightly  (in another terminal, here)"
# a background process ignores SIGINT by default, but a worker sends itself SIGINT to stop
env --default-signal=INT prefect worker start --pool local --name box &
worker=$!
wait -n
