"""Whole systems in virtual time: client, gateway, relay and portal cores over a simulated network."""
