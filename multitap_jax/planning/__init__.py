"""What a run will need of machines that are not there yet: memory, time at best, communication."""
