'use strict';
const get = id => document.getElementById(id);

// The gallery: three menus choose and order its cards
const gallery = get('gallery');
if (gallery) {
  const all = [...gallery.children];
  const number = new Intl.NumberFormat('en-GB');
  const key = {
    sure: card => -card.dataset.sure,
    unsure: card => +card.dataset.sure,
    image: card => +card.dataset.image,
  };
  const show = () => {
    const [is, said, order] = ['is', 'said', 'order'].map(id => get(id).value);
    for (const card of all) card.hidden = is && card.dataset.is !== is || said && card.dataset.said !== said;
    const left = all.filter(card => !card.hidden).length;
    gallery.append(...all.slice().sort((a, b) => key[order](a) - key[order](b)));
    get('count').textContent = number.format(left) + ' of ' + number.format(all.length);
    get('nothing').hidden = left > 0;
  };
  const controls = get('controls');
  controls.addEventListener('change', show);
  controls.addEventListener('reset', () => setTimeout(show)); // when the menus have been set back
  controls.addEventListener('submit', event => event.preventDefault());
  controls.hidden = false;
  show();
}

// The confusion matrix: the cell whose images are shown is marked
const mark = () => {
  for (const a of document.querySelectorAll('.confusion a, .pairs a')) {
    if (a.hash === location.hash) a.setAttribute('aria-current', 'true');
    else a.removeAttribute('aria-current');
  }
};
addEventListener('hashchange', mark);
mark();
