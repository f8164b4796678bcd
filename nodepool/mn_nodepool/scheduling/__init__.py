"""Decides where replicas run and how many there are. Pure: a snapshot and a time go in, actions come out."""
