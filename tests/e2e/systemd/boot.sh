#!/bin/bash
# Becomes systemd, as process 1 of a machine of its own: namespaces somebody else made (mount, PID,
# network, cgroup, UTS, IPC), this machine's programs, and nothing else of this machine.
#   boot.sh NAME SOURCE PYTHON PACKAGES    (checkout, Python's prefix, site-packages)
set -eu
name=$1 source=$2 python=$3 packages=$4

# Whatever is mounted over where they are.
exec 3<"$source" 4<"$python" 5<"$packages"
bound() { mkdir -p "$2"; mount --no-canonicalize --bind "/proc/self/fd/$1" "$2"; }

# Names of network namespaces are mounts: one that is seen here would keep the namespace alive.
umount --recursive --lazy /run/netns 2>/dev/null || true
mount --make-rprivate /
mount -t proc proc /proc

for folder in run opt var/lib var/log; do mount -t tmpfs -o mode=755 tmpfs "/$folder"; done
for folder in tmp var/tmp; do mount -t tmpfs -o mode=1777 tmpfs "/$folder"; done
mkdir /run/etc /run/dev /run/units
cp -a /etc/. /run/etc
mount --bind /run/etc /etc
rm -rf /etc/systemd/system /etc/machine-id
mkdir -p /etc/systemd/system
echo "$name" >/etc/hostname
echo "127.0.0.1 localhost" >/etc/hosts
systemd-machine-id-setup >/dev/null 2>&1

# A Python of this machine and an installed vwire, where every user may read them.
bound 3 /opt/source
bound 5 /opt/packages
if [ "$python" != /usr ]; then  # somebody's own, which may lie where nobody else may look
  bound 4 /opt/python
  python=/opt/python
  echo /opt/python/lib >/etc/ld.so.conf.d/00-python.conf
  ldconfig
fi
"$python/bin/python3" -m venv --without-pip /opt/vwire
printf '%s\n' /opt/source /opt/packages >"$(echo /opt/vwire/lib/python3*/site-packages)/vwire.pth"
printf '#!/bin/sh\nexec /opt/vwire/bin/python -P -m nsmctl "$@"\n' >/opt/vwire/bin/nsmctl
chmod 755 /opt/vwire/bin/nsmctl
exec 3<&- 4<&- 5<&-

# Devices as udev makes them.
mount -t tmpfs -o mode=755 tmpfs /run/dev
mkdir /run/dev/net /run/dev/pts /run/dev/shm
while read -r node mode major minor; do
  mknod -m "$mode" "/run/dev/$node" c "$major" "$minor"
done <<'END'
null 666 1 3
zero 666 1 5
full 666 1 7
random 666 1 8
urandom 666 1 9
tty 666 5 0
net/tun 666 10 200
END
ln -s /proc/self/fd /run/dev/fd
mount -t devpts -o newinstance,ptmxmode=0666 devpts /run/dev/pts
mount -t tmpfs -o mode=1777 tmpfs /run/dev/shm
ln -s pts/ptmx /run/dev/ptmx
mount --rbind /run/dev /dev

# The kernel's settings are everybody's, but for those of its own network.
mount --bind /proc/sys /proc/sys
mount --bind /proc/sys/net /proc/sys/net
mount -o remount,bind,ro /proc/sys
umount --recursive --lazy /sys
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup

for unit in basic exit final local-fs local-fs-pre multi-user network network-online network-pre \
  paths reboot shutdown slices sockets swap sysinit timers umount; do
  cp "/lib/systemd/system/$unit.target" /run/units
done
cp /lib/systemd/system/systemd-journald{.service,.socket,-dev-log.socket} /run/units
mkdir /run/units/sysinit.target.wants
ln -s ../systemd-journald.service /run/units/sysinit.target.wants

export container=vwire PATH=/opt/vwire/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export SYSTEMD_UNIT_PATH=/etc/systemd/system:/run/systemd/transient:/run/units
export SYSTEMD_GENERATOR_PATH=/nowhere SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/nowhere
exec setpriv --bounding-set=-sys_module,-sys_boot,-sys_time,-syslog \
  /lib/systemd/systemd --system --unit=multi-user.target --log-target=journal --show-status=no
