"""What can be measured of a promise of privacy: bounds on epsilon from below, and attacks that score what they read."""
