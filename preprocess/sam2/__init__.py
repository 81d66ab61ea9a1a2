"""SAM2 on video: weights, memory bank, tracker, and prompts from skeletons. No torch: an executor runs the
graphs of build/sam2.
"""
