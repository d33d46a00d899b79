"""Programs around the embedded services (floor 7)."""
