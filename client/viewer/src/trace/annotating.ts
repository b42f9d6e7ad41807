import {
  annotated,
  annotationKey,
  annotationsOf,
  annotationTitle,
  LONGEST,
  MOST,
} from '../model/annotations'
import type { FlowGraph, GraphNode } from '../model/flow_graph'
import { isolated } from '../model/tokens'
import { button, element } from '../presentation/elements'

// Naming heads and neurons: the dialog, and the lines below exported figures.

interface Kept {
  /** The annotations as a text. */
  text: () => string
  change: (text: string) => void
}

/** The dialog for the name and the note of a head or neuron; returns a function that opens it. */
export function annotationDialog(kept: Kept): (node: GraphNode) => void {
  let key = ''
  const title = element('h2', { id: 'annotation-title' })
  const name = element('input', {
    maxlength: String(LONGEST.name),
    autocomplete: 'off',
    dir: 'auto',
  })
  const note = element('textarea', { maxlength: String(LONGEST.note), rows: '4', dir: 'auto' })
  const save = (annotation: { name: string; note: string }) => {
    dialog.close()
    kept.change(annotated(kept.text(), key, annotation))
  }
  const remove = button('Remove', 'Remove the name and the note', () =>
    save({ name: '', note: '' }),
  )
  const form = element(
    'form',
    { method: 'dialog' },
    title,
    element('label', { class: 'field' }, element('span', {}, 'Name'), name),
    element('label', { class: 'field' }, element('span', {}, 'Note'), note),
    element(
      'p',
      { class: 'quiet' },
      'Both are kept in the address of this page and in its figures.',
    ),
    element(
      'div',
      { class: 'export-formats' },
      element('button', { class: 'button primary' }, 'Save'),
      remove,
      button('Cancel', 'Change nothing', () => dialog.close()),
    ),
  )
  const dialog = element(
    'dialog',
    { class: 'help annotation-dialog', 'aria-labelledby': 'annotation-title' },
    form,
  )
  name.addEventListener('input', () => name.setCustomValidity(''))
  form.addEventListener('submit', (event) => {
    event.preventDefault()
    const known = annotationsOf(kept.text())
    const full = known.size >= MOST && !known.has(key)
    name.setCustomValidity(full ? `${MOST} heads and neurons have names; remove one first.` : '')
    if (form.reportValidity()) save({ name: name.value, note: note.value })
  })
  document.body.append(dialog)
  return (node) => {
    const found = annotationKey(node)
    if (found === undefined) return
    key = found
    const known = annotationsOf(kept.text()).get(key)
    title.textContent = annotationTitle(key)
    name.value = known?.name ?? ''
    note.value = known?.note ?? ''
    name.setCustomValidity('')
    remove.hidden = known === undefined
    dialog.showModal()
    name.select()
  }
}

/** `L9 head 6 “name mover”: its note`, for every head and neuron with a name or a note. */
export function annotationLines({ annotations }: FlowGraph): string[] {
  return Array.from(annotations, ([key, { name, note }]) => {
    const title = annotationTitle(key, name)
    return note === '' ? title : `${title}: ${isolated(note)}`
  })
}
