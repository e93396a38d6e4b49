//! When devices want the time: their deadlines, and what the host timer is set to.
//!
//! A handful of devices have deadlines and change them rarely beside how often the guest exits, so
//! the earliest is found by looking at all of them.
//!
//! Invariant: `earliest` is the least of `deadlines`.

/// Deadlines by device, in nanoseconds of the guest's clock.
#[derive(Debug)]
pub(crate) struct Schedule {
    deadlines: Vec<Option<u64>>,
    earliest: Option<u64>,
    /// What the host timer is set to.
    armed: Option<u64>,
}

impl Schedule {
    /// `devices` devices that wait for nothing.
    pub(crate) fn new(devices: usize) -> Self {
        Schedule {
            deadlines: vec![None; devices],
            earliest: None,
            armed: None,
        }
    }

    /// Adds a device.
    pub(crate) fn add(&mut self) {
        self.deadlines.push(None);
    }

    /// What `device` waits for.
    #[inline]
    pub(crate) fn of(&self, device: usize) -> Option<u64> {
        self.deadlines[device]
    }

    /// `device` waits for `deadline`.
    pub(crate) fn set(&mut self, device: usize, deadline: Option<u64>) {
        self.deadlines[device] = deadline;
        self.earliest = self.deadlines.iter().flatten().copied().min();
    }

    /// The earliest deadline.
    pub(crate) fn next(&self) -> Option<u64> {
        self.earliest
    }

    /// The device whose deadline is the earliest, if that has come.
    pub(crate) fn due(&self, now: u64) -> Option<usize> {
        let earliest = self.earliest.filter(|&deadline| deadline <= now)?;
        self.deadlines
            .iter()
            .position(|&deadline| deadline == Some(earliest))
    }

    /// What to set the host timer to, if it is set to anything else than `wanted`.
    pub(crate) fn arm(&mut self, wanted: Option<u64>) -> Option<Option<u64>> {
        (self.armed != wanted).then(|| {
            self.armed = wanted;
            wanted
        })
    }

    /// The host timer has gone off.
    pub(crate) fn expired(&mut self) {
        self.armed = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_earliest_device_comes_first_and_only_when_its_time_has_come() {
        let mut schedule = Schedule::new(2);
        schedule.add();
        assert_eq!(schedule.due(u64::MAX), None);
        schedule.set(2, Some(50));
        schedule.set(0, Some(70));
        assert_eq!(schedule.next(), Some(50));
        assert_eq!(schedule.due(49), None);
        assert_eq!(schedule.due(100), Some(2));
        schedule.set(2, None);
        assert_eq!(schedule.due(100), Some(0));
        assert_eq!(schedule.of(2), None);
    }

    #[test]
    fn the_host_timer_is_set_on_change_only() {
        let mut schedule = Schedule::new(0);
        assert_eq!(schedule.arm(None), None);
        assert_eq!(schedule.arm(Some(5)), Some(Some(5)));
        assert_eq!(schedule.arm(Some(5)), None);
        schedule.expired();
        assert_eq!(schedule.arm(Some(5)), Some(Some(5)));
        assert_eq!(schedule.arm(None), Some(None));
    }
}
