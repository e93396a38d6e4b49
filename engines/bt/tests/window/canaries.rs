//! Words in this process's memory that show whether a guest has written there.

pub(crate) const CANARY: u64 = 0x5aa5_c33c_9669_f00f;

/// Memory of the VMM's that nobody has a reason to write.
pub(crate) struct Canaries {
    boxed: Box<[u64; 512]>,
    mapped: *mut u64,
}

static mut STATIC: u64 = CANARY;

impl Canaries {
    pub(crate) fn new() -> Canaries {
        // SAFETY: a fresh anonymous mapping.
        let mapped = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(mapped, libc::MAP_FAILED);
        let mapped = mapped.cast::<u64>();
        // SAFETY: inside the mapping.
        unsafe { std::slice::from_raw_parts_mut(mapped, 512).fill(CANARY) };
        Canaries {
            boxed: Box::new([CANARY; 512]),
            mapped,
        }
    }

    pub(crate) fn addresses(&self) -> [u64; 3] {
        [
            &raw const self.boxed[200] as u64,
            self.mapped as u64 + 800,
            &raw const STATIC as u64,
        ]
    }

    pub(crate) fn intact(&self) -> bool {
        // SAFETY: inside the mapping, and a static that nobody else uses.
        let (mapped, fixed) = unsafe {
            (
                std::slice::from_raw_parts(self.mapped, 512),
                (&raw const STATIC).read_volatile(),
            )
        };
        let boxed = std::hint::black_box(&*self.boxed);
        boxed.iter().chain(mapped).all(|&word| word == CANARY) && fixed == CANARY
    }
}

impl Canaries {
    /// Puts one word back.
    pub(crate) fn mend(&mut self, address: u64) {
        assert!(self.addresses().contains(&address));
        // SAFETY: one of this value's own words.
        unsafe { (address as *mut u64).write_volatile(CANARY) };
    }
}

impl Drop for Canaries {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own.
        unsafe { libc::munmap(self.mapped.cast(), 4096) };
    }
}
