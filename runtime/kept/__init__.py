"""Files beside a video: the record of how it was made, and finished windows to go on from."""
