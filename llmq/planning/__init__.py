"""What a run will need and take, known before it starts: memory, disk, time, from headers and shapes alone."""
