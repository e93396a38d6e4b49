//! Guest images, built from programs and guest and embedded.
