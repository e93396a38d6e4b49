//! Dynamic binary translation: the engine of full virtualization.
