# Runs a command in a root file system that stands for a container: a mount namespace of its own, no engine and no root needed.
#   unshare --user --map-root-user --mount bash enter_rootfs.sh build|run ROOT PYTHON_PREFIX WORKDIR USER COMMAND...
# build: as root of the namespace, writable. run: read-only but for /tmp and /dev/shm, as USER, without capabilities.
# In place of a base image stands this machine's own /usr and /etc, with the Python at PYTHON_PREFIX as /usr/local.
set -eu
mode=$1 root=$2 python=$3 workdir=$4 user=$5
shift 5

read_only() { # SOURCE TARGET
  mkdir -p "$root$2"
  mount --rbind "$1" "$root$2"
  mount -o remount,bind,ro "$root$2"
}

mkdir -p "$root/proc" "$root/dev/shm" "$root/tmp" "$root/old" "$root/usr"
mount --bind "$root" "$root"
for each in bin sbin lib lib64; do
  if [ -L "/$each" ]; then ln -sfn "$(readlink "/$each")" "$root/$each"; elif [ -d "/$each" ]; then read_only "/$each" "/$each"; fi
done
read_only /usr /usr
read_only /etc /etc
[ "$python" = /usr ] || read_only "$python" /usr/local
if [ "$mode" = build ]; then # what pip's configuration names on this machine
  for each in ${PIP_FIND_LINKS:-}; do [ ! -d "$each" ] || read_only "$each" "$each"; done
fi
mount --rbind /proc "$root/proc"
for each in null zero full random urandom; do touch "$root/dev/$each"; mount --bind "/dev/$each" "$root/dev/$each"; done
for each in /tmp /dev/shm; do mount -t tmpfs -o mode=1777 tmpfs "$root$each"; done
[ "$mode" = build ] || mount -o remount,bind,ro "$root"

cd "$root"
/usr/sbin/pivot_root . old
umount -l /old
cd "$workdir"
[ "$mode" = run ] || exec "$@"
exec unshare --user --map-user="${user%%:*}" --map-group="${user##*:}" setpriv --no-new-privs "$@"
