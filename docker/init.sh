#!/bin/sh
# Makes the files of a federation: the demo's data for three companies, certificates, and a key for each site.
# Each file goes into the volume of the container that needs it. A site's volume is mounted by that site alone.
# Volumes that already hold files are left as they are, unless this script was interrupted while it filled them.
set -eu

server=/init/server
unfinished=$server/.unfinished
if [ -e "$unfinished" ]; then
    find /init -mindepth 2 ! -path "$unfinished" -delete
elif [ -n "$(find /init -mindepth 2 | head -n 1)" ]; then
    echo "there are files in the volumes already: nothing is made"
    exit 0
fi
touch "$unfinished"

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
# Remove what the server does not need: the CA signs nothing else, and the rows belong to the sites.
rm -r tls/ca.key runs/demo-data/train.csv runs/demo-data/sites
rm .unfinished
