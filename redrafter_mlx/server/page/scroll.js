// Scrolling: the end of an answer stays in sight only if the reader is there.

const NEAR = 32; // pixels from the end that count as being there

export class Sticky {
  /** away: called with whether the end is out of sight. */
  constructor(scroller, away) {
    Object.assign(this, { scroller, away });
    this.stuck = true;
    this.last = 0;
    scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    // Also where something else than an answer changes: the window, an open panel, a code's width.
    this.watch = new ResizeObserver(() => this.grown());
    this.watch.observe(scroller);
  }

  /** The content has changed. */
  grown() {
    if (this.stuck) this.#toEnd();
    else this.away(this.#left() > NEAR);
  }

  /** Go to the beginning, and stay there. */
  rest() {
    this.stuck = false;
    this.scroller.scrollTop = 0;
    this.away(false);
  }

  /** Go to the end, and stay there. */
  follow() {
    this.stuck = true;
    this.#toEnd();
    this.away(false);
  }

  #left() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight;
  }

  #toEnd() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
    this.last = this.scroller.scrollTop;
  }

  #scrolled() {
    // A move upwards lets go at once, however small: nobody should have to fight for it.
    const up = this.scroller.scrollTop < this.last - 1;
    this.last = this.scroller.scrollTop;
    this.stuck = this.#left() <= (up ? 1 : NEAR);
    this.away(!this.stuck);
  }
}
