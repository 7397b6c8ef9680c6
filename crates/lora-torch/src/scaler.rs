//! Loss scaling for fp16 (Micikevicius et al., "Mixed Precision Training", ICLR 2018), with the dynamics of PyTorch's
//! GradScaler: halve after an overflow, double after 2000 steps without one. Whether gradients overflowed is
//! for [`crate::gradients::settle`] to say. In fp32 and bf16 the scale is 1 and stays so.

/// The loss scale and its dynamics.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossScaler {
    scale: f64,
    /// `None`: the scale is fixed.
    growth_interval: Option<u32>,
    good_steps: u32,
}

impl LossScaler {
    /// Dynamic scaling from 65536, for fp16.
    pub fn dynamic() -> Self {
        Self::dynamic_from(65536.0, 2000)
    }

    /// Dynamic scaling from `scale`, doubling after `growth_interval` steps without overflow.
    pub fn dynamic_from(scale: f64, growth_interval: u32) -> Self {
        Self { scale, growth_interval: Some(growth_interval), good_steps: 0 }
    }

    /// No scaling, for fp32 and bf16.
    pub fn fixed() -> Self {
        Self { scale: 1.0, growth_interval: None, good_steps: 0 }
    }

    /// The factor to multiply the loss by before its backward pass.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// The scale and the steps without overflow since it last changed: what a run that goes on needs.
    pub fn state(&self) -> (f64, u32) {
        (self.scale, self.good_steps)
    }

    /// Goes on from a state; a fixed scale stays what it is.
    pub fn restore(&mut self, (scale, good_steps): (f64, u32)) {
        if self.growth_interval.is_some() {
            (self.scale, self.good_steps) = (scale, good_steps);
        }
    }

    /// Adapts the scale after a step whose gradients were all `finite`, or not.
    pub fn update(&mut self, finite: bool) {
        let Some(interval) = self.growth_interval else { return };
        if !finite {
            // Below 2^-14 the gradients are broken for another reason; the caller counts skipped steps and says so.
            self.scale = (self.scale / 2.0).max(f64::powi(2.0, -14));
            self.good_steps = 0;
        } else {
            self.good_steps += 1;
            if self.good_steps == interval {
                self.scale = (self.scale * 2.0).min(f64::powi(2.0, 24));
                self.good_steps = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_recovers() {
        let mut scaler = LossScaler::dynamic_from(1024.0, 3);
        scaler.update(false);
        (0..3).for_each(|_| scaler.update(true));
        assert_eq!(scaler.scale(), 1024.0);
        (0..2).for_each(|_| scaler.update(true));
        let mut again = LossScaler::dynamic_from(1.0, 3);
        again.restore(scaler.state());
        again.update(true);
        assert_eq!(again.state(), (2048.0, 0));
        (0..100).for_each(|_| scaler.update(false));
        assert!(scaler.scale() > 0.0);
        let mut fixed = LossScaler::fixed();
        fixed.restore(scaler.state());
        assert_eq!(fixed, LossScaler::fixed());
    }
}
