# What the container runs before its command: the volume's folders, which a folder of the host in its place does not have yet.
folders=(/flatmin/data /flatmin/runs /flatmin/sweeps /flatmin/searches)
for folder in "${folders[@]}"; do
  if ! mkdir -p "$folder" 2>/dev/null || ! [ -w "$folder" ]; then
    echo "$folder, in what is mounted at /flatmin, cannot be written by user id $(id -u): give the folder to it (on the host: sudo chown -R $(id -u) FOLDER), or mount a named volume, -v flatmin:/flatmin" >&2
    exit 1
  fi
done
exec "$@"
