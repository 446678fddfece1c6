#!/bin/bash
# A real S3 server for the tests: Ceph's RADOS gateway with one monitor and one OSD, on loopback only.
# usage: rgw.sh FOLDER PORT ACCESS_KEY SECRET_KEY    runs in the foreground; FOLDER/ready appears when it can be used
# Debian packages: ceph-mon ceph-osd radosgw ceph-common
set -e
folder=$1 port=$2 access_key=$3 secret_key=$4
export CEPH_CONF=$folder/ceph.conf
mkdir -p "$folder"/{mon,osd,run,rgw}
cluster=$(cat /proc/sys/kernel/random/uuid)

# ms_mon_client_mode: without it radosgw waits for ever when authentication is off.
# mon_data_avail_crit: the monitor would stop itself on a disk that is nearly full.
# paxos_*: the monitor would collect changes of the cluster for a second before it makes them, two dozen times.
# osd_objectstore: no test kills the OSD, so that it may keep its objects in memory.
cat > "$CEPH_CONF" <<CONF
[global]
fsid=$cluster
mon_initial_members=a
mon_host=[v2:127.0.0.1:$((port + 1))]
public_addr=127.0.0.1
cluster_addr=127.0.0.1
auth_cluster_required=none
auth_service_required=none
auth_client_required=none
ms_mon_client_mode=crc
mon_data_avail_warn=2
mon_data_avail_crit=1
paxos_propose_interval=0.01
paxos_min_wait=0.01
mon_allow_pool_size_one=true
mon_max_pg_per_osd=1000
mon_data=$folder/mon
osd_pool_default_size=1
osd_pool_default_min_size=1
osd_pool_default_pg_num=4
osd_pool_default_pg_autoscale_mode=off
osd_crush_chooseleaf_type=0
osd_data=$folder/osd
osd_objectstore=memstore
osd_memory_target=939524096
run_dir=$folder/run
pid_file=$folder/run/\$name.pid
admin_socket=$folder/run/\$name.asok
log_file=$folder/run/\$name.log
rgw_data=$folder/rgw
rgw_frontends=beast endpoint=127.0.0.1:$port
rgw_cache_enabled=false
CONF

stop() {  # the gateway first, the monitor last
    set +e
    for process in $gateway $osd $monitor; do
        kill "$process"
        for _ in $(seq 50); do kill -0 "$process" || break; sleep 0.1; done
        kill -9 "$process"
    done 2>/dev/null
}
trap stop EXIT
trap 'exit 0' TERM INT

monmaptool --create --fsid "$cluster" --addv a "[v2:127.0.0.1:$((port + 1))]" "$folder/monmap"
ceph-mon --mkfs -i a --monmap "$folder/monmap"
ceph-mon -f -i a & monitor=$!
until timeout 20 ceph -s; do sleep 0.5; done
osd_id=$(cat /proc/sys/kernel/random/uuid)
timeout 30 ceph osd new "$osd_id"
ceph-osd -i 0 --mkfs --osd-uuid "$osd_id"
timeout 30 ceph osd crush add osd.0 1.0 root=default host=localhost
ceph-osd -f -i 0 & osd=$!
radosgw -f -n client.rgw & gateway=$!
timeout 120 radosgw-admin user create --uid=tests --display-name=tests --access-key="$access_key" --secret="$secret_key"
touch "$folder/ready"
wait
