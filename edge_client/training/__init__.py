"""Local training: data, the loop, what it keeps of the frozen part, and the proof that this machine computes right."""
