"""Where models lie on this device, and how they get there."""
