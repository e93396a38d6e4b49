//! Floors: what the host's own mechanisms cost, without any guest. Reference lines for benches.
