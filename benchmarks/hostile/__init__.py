"""What the program does when it is treated badly: killed, given flipped bytes, given wrong input.

`python -m benchmarks.hostile` runs the commands from outside, as a user does, and counts what it
should not have done. The tables say what must happen in the words of the documentation; they know
nothing of how the program does it. See `benchmarks.hostile.__main__`.
"""
