"""What the two networks of people have before and behind them, on the GPU: frames, crops and heat maps.

Only what is small goes back and forth: frames as uint8 to the GPU, a few peaks or rows from it. The host's
versions in detect.py and pose.py say what is computed here and stay the reference.
"""
