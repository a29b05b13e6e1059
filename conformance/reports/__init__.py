"""What a run leaves behind: its stream, and everything that people read which is made of streams."""
