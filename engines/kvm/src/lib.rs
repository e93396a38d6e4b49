//! Hardware-assisted virtualization through /dev/kvm.
