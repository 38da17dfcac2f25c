#!/bin/sh
# Makes what a federation needs, once: the demo's data for three companies, certificates, and a key for each site.
# Each file goes into the volume of whoever needs it; a site's volume is mounted by no other site, nor by the server.
set -eu

server=/init/server
[ -e "$server/.ready" ] && exit 0

cd "$server"
tsugiki demo --data-only --output-dir runs
tsugiki site split runs/demo-data/demo.toml /tmp/sites
tsugiki certs --host server --tls tls
for site in logistics software clinic; do
    cp -R "/tmp/sites/$site/." "/init/$site"
    cp tls/ca.crt "/init/$site"
    tsugiki keys new "/init/$site/node.key"
    tsugiki keys register "/init/$site/node.key.pub" --name "$site" --keys keys
    printf '\n[server]\naddress = "server:9092"\nca = "ca.crt"\nkey = "node.key"\n' >>"/init/$site/site.toml"
done
# What the server does not need does not stay there: the CA signs nothing else, and the rows are the sites'.
rm -r tls/ca.key runs/demo-data/train.csv runs/demo-data/sites
touch .ready
