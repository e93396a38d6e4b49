//! Registry of modes, and the VMM binary trapline.
