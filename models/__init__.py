"""Models that this project builds itself: random ones to measure and test with, and the demo model."""
