/** Remembers what was drawn last, so that the same is not drawn again. */
export class Once {
  private last: string | undefined

  /** Whether these differ from those of the call before. */
  differs(...parts: readonly (string | number | boolean)[]): boolean {
    const key = parts.join(' ')
    const changed = key !== this.last
    this.last = key
    return changed
  }
}
