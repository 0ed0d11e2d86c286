"""What must hold: an executable reference that reads like the manual."""
