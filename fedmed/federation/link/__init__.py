"""The network between one coordinator and its sites: HTTPS, each end known by its key."""
