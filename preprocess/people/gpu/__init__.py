"""Pre- and post-processing of the detector and the pose network on the GPU: frames, crops and heat maps.

Frames go to the GPU as uint8, and a few peaks or rows come back. detect.py, crops.py and heatmaps.py are the
reference.
"""
