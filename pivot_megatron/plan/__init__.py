"""What a run would take on given machines, by count: memory, time, and which layout to pick."""
