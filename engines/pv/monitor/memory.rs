//! Pointers of the guest kernel: what lies where the kernel may read or write.

use crate::hypercall::errno::EFAULT;
use crate::hypercall::layout::DIRECT_MAP;
use crate::wire::{PAGE, k, relax};
use crate::{State, plan, sys};

/// A negated error number.
pub(crate) type Errno = i64;

impl State {
    /// Whether `length` bytes at `address` lie in memory on which the kernel has all of `rights`.
    pub(crate) fn kernel_has(&self, address: u64, length: u64, rights: u64) -> bool {
        if self.relax & relax::TRUST_POINTERS != 0 {
            return true;
        }
        let Some(end) = address.checked_add(length) else {
            return false;
        };
        let plan = plan();
        let within = |start: u64, length: u64, has: u64| {
            start <= address && end <= start + length && rights & !has == 0
        };
        const RW: u64 = sys::PROT_READ | sys::PROT_WRITE;
        within(DIRECT_MAP, plan.ram, RW)
            || within(k::UPCALL_FRAME, k::BOOT_SIZE, RW)
            || within(k::START_INFO, PAGE, sys::PROT_READ)
            || plan
                .segment
                .iter()
                .take(plan.segments as usize)
                .any(|segment| within(segment.address, segment.length, segment.rights))
    }

    /// An array of the kernel's, to read.
    ///
    /// # Errors
    /// EFAULT, negated.
    pub(crate) fn array<T: Copy>(&self, address: u64, count: u64) -> Result<Array<T>, Errno> {
        let length = count.checked_mul(size_of::<T>() as u64).ok_or(-EFAULT)?;
        if !address.is_multiple_of(align_of::<T>() as u64)
            || !self.kernel_has(address, length, sys::PROT_READ)
        {
            return Err(-EFAULT);
        }
        Ok(Array {
            address: address as *const T,
            count,
        })
    }

    /// One value of the kernel's.
    ///
    /// # Errors
    /// EFAULT, negated.
    pub(crate) fn read<T: Copy>(&self, address: u64) -> Result<T, Errno> {
        Ok(self.array(address, 1)?.get(0))
    }

    /// Checks that a value can be written at `address`.
    ///
    /// # Errors
    /// EFAULT, negated.
    pub(crate) fn writable<T: Copy>(&self, address: u64) -> Result<Place<T>, Errno> {
        if !address.is_multiple_of(align_of::<T>() as u64)
            || !self.kernel_has(address, size_of::<T>() as u64, sys::PROT_WRITE)
        {
            return Err(-EFAULT);
        }
        Ok(Place(address as *mut T))
    }

    /// Whether `address` can be an entry point.
    pub(crate) fn executable(&self, address: u64) -> bool {
        self.kernel_has(address, 1, sys::PROT_EXEC)
    }
}

/// A checked array in the kernel's memory.
pub(crate) struct Array<T> {
    address: *const T,
    count: u64,
}

impl<T: Copy> Array<T> {
    /// The element at `index`, which must be below the count.
    pub(crate) fn get(&self, index: u64) -> T {
        assert!(index < self.count);
        // SAFETY: in the range that was checked; volatile, since its owner may be anybody's memory.
        unsafe { self.address.add(index as usize).read_volatile() }
    }
}

/// A checked place in the kernel's memory.
pub(crate) struct Place<T>(*mut T);

impl<T: Copy> Place<T> {
    /// Stores `value`.
    pub(crate) fn put(&self, value: T) {
        // SAFETY: the place was checked when this was made.
        unsafe { self.0.write_volatile(value) }
    }
}
