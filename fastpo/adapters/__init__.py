"""Fused losses inside of other people's trainers, one file each."""
