//! Renders a run's files into one self-contained HTML page.
