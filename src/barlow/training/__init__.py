"""Barlow Twins: network, views, loss, optimizer, and the state of a run."""
