"""SAM2 on video: weights, memory bank, tracker, and prompts from skeletons. No torch; what computes is an
executor over the graphs of build/sam2.
"""
