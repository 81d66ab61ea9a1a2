"""The user's cache folder: graphs, engines, measurements."""
